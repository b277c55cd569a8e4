"""Where the score of a response comes from: rules, tests in a sandbox, servers, and their sum."""
