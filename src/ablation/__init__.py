"""What each ingredient is worth: runs that differ by one ingredient, on the same seeds."""
