"""One factory from a model configuration to the stage chunks that this rank holds."""
