"""What is optimized, one file per objective; ``base.py`` says what an objective is."""
