"""A complete training in minutes: drawn shapes, all three trainers, a picture from the result."""
