"""What to run: recipes as data, and the little code that turns them into checked choices of parts."""
