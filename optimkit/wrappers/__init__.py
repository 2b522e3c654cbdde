"""Transformations that take an ``inner`` one and change how or when it runs."""
