"""Recipes of instruqt/README.md."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")


def read_recipe(title: str) -> dict[str, str]:
    """Return the scripts of a recipe by their roles."""
    (section,) = re.findall(rf"^## Recipe: {title}\n(.*?)(?=^## )", PAGE, re.M | re.S)
    return dict(re.findall(r"^```\w+ (\w+)\n(.*?)^```", section, re.M | re.S))
