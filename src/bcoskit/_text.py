"""Text of unknown origin, for terminals."""


def printable(text: str) -> str:
    """The text in one line, without characters that speak to the terminal or have no encoding."""
    return "".join(character if character.isprintable() else "�" for character in " ".join(text.split()))
