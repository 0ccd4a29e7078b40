"""A study of architectures at equal text: rows of trainings, and a runner that can be picked up again."""
