"""Quantized weights: one tensor type (`tensor`), and the table of file formats that become it (`formats`)."""
