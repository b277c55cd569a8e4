"""A package only so that no installed package of the same name is taken for it."""
