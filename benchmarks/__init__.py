"""What is published here: results, what reports them, and a study of architectures. Not in the wheel."""
