"""Quantized weights: one tensor type (`tensor`) and one table of the file formats that become it (`formats`)."""
