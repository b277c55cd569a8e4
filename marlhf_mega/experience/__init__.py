"""From rollouts to experience: scores, log-probs, values, macro actions, advantages."""
