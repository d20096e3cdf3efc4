"""The trust that scores deserve: they are held against models that were retrained."""
