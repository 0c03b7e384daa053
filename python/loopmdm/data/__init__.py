"""Data for training and evaluation: `loopmdm.data.sudoku` and text."""
