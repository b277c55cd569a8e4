"""The frozen configuration of a run: schema, loader and the checks that span sections."""
