"""Which layer a parameter or a module belongs to, by its name."""

__all__ = ["layer_of"]


def layer_of(name: str) -> str:
    """The layer of a parameter: its name up to and including the first number.

    Where no part of the name is a number it is the module that holds the parameter, and a name of
    one part stays as it is.

    Example:
        >>> layer_of("model.layers.3.attention.weight"), layer_of("model.embed_tokens.weight")
        ('model.layers.3', 'model.embed_tokens')
    """
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdecimal()), None)
    if number is not None:
        return ".".join(parts[: number + 1])
    return ".".join(parts[:-1]) or name
