from marlhf_mega.rewards.scores import other_fields


def test_a_source_gets_prompt_and_response_only_once():
    row = {"prompt": "Count.", "response": "1, 2", "final": 2, "prompts": ["a"]}
    assert other_fields(row) == {"final": 2, "prompts": ["a"]}
    assert row["prompt"] == "Count."
