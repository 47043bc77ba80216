"""The exhibits of the paper, one a file: which runs, its table, its picture, its claims."""
