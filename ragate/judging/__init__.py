"""How far a judge can be believed: held against labels that people gave, and against itself."""
