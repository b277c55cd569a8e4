"""Three responses, and what a model might say of them."""

PROMPTS, RESPONSES = [[1], [2, 3], [4]], [[5, 6], [7], [8, 9, 6]]


def logprobs_of(batch):
    """What a model might say, a function of each token alone."""
    return batch.to_grid(-0.1 * batch.response_tokens.float())


def total(losses):
    return [sum(float(x) for x in xs) for xs in zip(*losses, strict=True)]
