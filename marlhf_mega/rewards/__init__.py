"""Where the score of a response comes from: rules, and sums of several sources."""
