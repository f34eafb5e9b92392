"""Other people's engines and trainers. Each integration is a leaf that imports its host when it is used."""

__all__ = []
