"""`python -m marlhf_mega`, the same as `marlhf`."""

from marlhf_mega.cli import run

if __name__ == "__main__":
    run()
