"""What is asked of arguments, and of objects that are not ours."""
