"""Reports made from a stored run: HTML page, pull-request comment, terminal."""
