"""The shipped recipes (YAML); their schema is `nvila.components.contracts.recipe.recipe`."""
