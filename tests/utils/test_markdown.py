"""A Markdown table has a rule as wide as its head, and numbers to the right."""

from mllm.utils.markdown import markdown_table


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    rows = [["small", "1.0"], ["large", "2.5"]]
    assert markdown_table(["model", "WER"], rows).splitlines() == [
        "| model | WER |",
        "| --- | ---: |",
        "| small | 1.0 |",
        "| large | 2.5 |",
    ]
    assert markdown_table(["model", "said"], [["small", "yes"]], of_numbers=False) == (
        "| model | said |\n| --- | --- |\n| small | yes |"
    )
