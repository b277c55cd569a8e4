"""Commands that are not training jobs: each reads its inputs, runs, and says what it found."""
