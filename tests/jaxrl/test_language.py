"""Language consistency on prose around mathematics and code."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl.rewards.language import consistent, identify

SENTENCES = {
    "en": "Okay, so I need to find the number of apples that are left in the basket.",
    "fr": "Bon, je dois trouver le nombre de pommes qui restent dans le panier.",
    "es": "Bueno, necesito encontrar el número de manzanas que quedan en la cesta.",
    "it": "Allora, devo trovare il numero di mele che restano nel cestino.",
    "de": "Also, ich muss die Anzahl der Äpfel finden, die im Korb übrig sind.",
    "zh": "我需要找到篮子里剩下的苹果的数量。",
    "ru": "Итак, мне нужно найти количество яблок, которые остались в корзине.",
}
NOISE = (
    "$\\text{the sum of all the numbers in the set}$",
    "\\[ \\text{where the value is the largest of them} \\]",
    "```python\nfor number in the_whole_list: print('this is the English text', number)\n```",
    "`the name of the variable` \\boxed{\\text{none of the above}} \\frac{1}{2} </think>",
)


@pytest.mark.parametrize("language", SENTENCES)
def test_prose_is_recognised_whatever_mathematics_and_code_surround_it(language: str):
    assert identify(SENTENCES[language]) == language
    for noise in NOISE:
        assert identify(f"{SENTENCES[language]} {noise}") == language


@pytest.mark.parametrize("text", ["", "42", "\\boxed{4}", "x = y + z", *NOISE])
def test_too_little_prose_has_no_language(text: str):
    assert identify(text) is None


def test_a_switch_of_language_between_any_two_parts_is_inconsistent():
    for first in SENTENCES:
        for second in SENTENCES:
            a, b = SENTENCES[first], SENTENCES[second]
            assert consistent(a, a, b) is (first == second)
            assert consistent(a, b, a) is (first == second)
            assert consistent(b, a, a) is (first == second)


def test_a_bare_answer_is_ignored_but_one_part_alone_is_no_evidence():
    english, french = SENTENCES["en"], SENTENCES["fr"]
    assert consistent(english, english, "$\\boxed{4}$")
    assert not consistent(english, french, "$\\boxed{4}$")
    assert not consistent(english, "", "4")
    assert not consistent("2+2=", "4", "4")


def test_a_very_long_text_is_judged_by_its_ends():
    english, french = SENTENCES["en"], SENTENCES["fr"]
    assert identify(english * 300 + french + english * 300) == "en"
    assert identify("$" * 1_000_000) is None


def test_the_identifier_is_loaded_only_when_it_is_asked():
    code = "import sys, jaxrl.rewards.language; assert 'py3langid' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
