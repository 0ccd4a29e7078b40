"""Complete configurations, each a function that returns a recipe."""

from __future__ import annotations

from collections.abc import Callable

from thoughtformer.errors import ConfigError, nearest
from thoughtformer.recipes.tiny import tiny_gpt, tiny_gpt_sentinel, tiny_gpthf
from thoughtformer.train.recipe import Recipe

__all__ = ["RECIPES", "recipe", "tiny_gpt", "tiny_gpt_sentinel", "tiny_gpthf"]

RECIPES: dict[str, Callable[[], Recipe]] = {"tiny-gpthf": tiny_gpthf, "tiny-gpt": tiny_gpt}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises `ConfigError` naming the nearest."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}.{nearest(name, RECIPES)}")
    return RECIPES[name]()
