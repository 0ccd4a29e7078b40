"""How to attend: dense masks, gathered blocks, caches, tokens beside summaries, rotary positions. Knows no rule."""
