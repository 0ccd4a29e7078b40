"""A study of architectures at equal text: rows of trainings, a runner that can be picked up again, tables and plots."""
