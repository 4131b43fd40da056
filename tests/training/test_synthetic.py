from __future__ import annotations

import datetime
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_attn.training import synthetic
from fused_attn.training.synthetic import (
    MAX_NUMBER,
    date_to_chinese,
    date_to_english,
    generate_pairs,
    number_to_chinese,
    number_to_english,
    romanize,
    time_to_chinese,
    time_to_english,
    year_to_chinese,
    year_to_english,
)


@pytest.mark.parametrize(
    ("number", "english", "chinese"),
    [
        (0, "zero", "零"),
        (2, "two", "二"),
        (10, "ten", "十"),
        (12, "twelve", "十二"),
        (20, "twenty", "二十"),
        (21, "twenty-one", "二十一"),
        (100, "one hundred", "一百"),
        (105, "one hundred five", "一百零五"),
        (110, "one hundred ten", "一百一十"),
        (115, "one hundred fifteen", "一百一十五"),
        (222, "two hundred twenty-two", "二百二十二"),
        (1_000, "one thousand", "一千"),
        (1_005, "one thousand five", "一千零五"),
        (1_050, "one thousand fifty", "一千零五十"),
        (1_015, "one thousand fifteen", "一千零一十五"),
        (2_002, "two thousand two", "两千零二"),
        (2_222, "two thousand two hundred twenty-two", "两千二百二十二"),
        (10_000, "ten thousand", "一万"),
        (10_015, "ten thousand fifteen", "一万零一十五"),
        (20_300, "twenty thousand three hundred", "两万零三百"),
        (23_000, "twenty-three thousand", "两万三千"),
        (22_222, "twenty-two thousand two hundred twenty-two", "两万两千二百二十二"),
        (100_020, "one hundred thousand twenty", "十万零二十"),
        (120_000, "one hundred twenty thousand", "十二万"),
        (150_000, "one hundred fifty thousand", "十五万"),
        (203_000, "two hundred three thousand", "二十万三千"),
        (1_020_000, "one million twenty thousand", "一百零二万"),
        (20_020_000, "twenty million twenty thousand", "两千零二万"),
        (10_100_000, "ten million one hundred thousand", "一千零一十万"),
        (100_000_000, "one hundred million", "一亿"),
        (
            100_001_234,
            "one hundred million one thousand two hundred thirty-four",
            "一亿零一千二百三十四",
        ),
        (100_150_000, "one hundred million one hundred fifty thousand", "一亿零一十五万"),
        (200_000_002, "two hundred million two", "两亿零二"),
        (1_500_000_000, "one billion five hundred million", "十五亿"),
        (
            1_512_345_678,
            "one billion five hundred twelve million three hundred forty-five thousand "
            "six hundred seventy-eight",
            "十五亿一千二百三十四万五千六百七十八",
        ),
        (100_000_000_000, "one hundred billion", "一千亿"),
    ],
)
def test_numbers(number: int, english: str, chinese: str) -> None:
    assert number_to_english(number) == english
    assert number_to_chinese(number) == chinese


def test_british_and_measured_numbers() -> None:
    assert number_to_english(1_205, with_and=True) == "one thousand two hundred and five"
    assert number_to_english(1_005, with_and=True) == "one thousand and five"
    assert number_to_english(115_000, with_and=True) == "one hundred and fifteen thousand"
    assert number_to_english(42, with_and=True) == "forty-two"
    assert [number_to_chinese(n, measured=True) for n in (2, 12, 200)] == ["两", "十二", "二百"]


def parse_chinese(text: str) -> int:
    """Read a Chinese numeral by adding up places: independent of how it was written."""
    digits = {**{d: i for i, d in enumerate("零一二三四五六七八九")}, "两": 2}
    total = group = 0
    digit: int | None = None
    for character in text:
        if character in digits:
            digit = digits[character]
        elif character in "十百千":
            group += (1 if digit is None else digit) * {"十": 10, "百": 100, "千": 1000}[character]
            digit = None
        else:
            total += (group + (digit or 0)) * {"万": 10**4, "亿": 10**8}[character]
            group, digit = 0, None
    return total + group + (digit or 0)


def parse_english(text: str) -> int:
    """Read an English numeral by adding up words."""
    values = {word: value for value, word in enumerate(synthetic._ONES)}
    values |= {word: 10 * tens for tens, word in enumerate(synthetic._TENS) if tens > 1}
    scales = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
    total = group = 0
    for word in text.replace("-", " ").replace(" and ", " ").split():
        if word == "hundred":
            group *= 100
        elif word in scales:
            total += group * scales[word]
            group = 0
        else:
            group += values[word]
    return total + group


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.integers(0, MAX_NUMBER),
        st.integers(0, 99_999),
        st.lists(st.sampled_from("0000123"), min_size=1, max_size=12).map(
            lambda digits: int("".join(digits))
        ),
    ),
    st.booleans(),
)
def test_numerals_mean_the_number_and_keep_the_rules(number: int, flag: bool) -> None:
    assert parse_english(number_to_english(number, with_and=flag)) == number
    chinese = number_to_chinese(number, measured=flag)
    assert parse_chinese(chinese) == number
    assert "零零" not in chinese
    assert number == 0 or not chinese.endswith("零")
    assert not chinese.startswith("一十")
    assert not re.search("二千|^二[万亿]", chinese)


def test_numbers_out_of_range() -> None:
    for write in (number_to_english, number_to_chinese):
        for number in (-1, MAX_NUMBER + 1):
            with pytest.raises(ValueError, match=r"number must be in 0\.\.999999999999, got"):
                write(number)


@pytest.mark.parametrize(
    ("year", "english", "chinese"),
    [
        (1900, "nineteen hundred", "一九〇〇年"),
        (1905, "nineteen oh five", "一九〇五年"),
        (1999, "nineteen ninety-nine", "一九九九年"),
        (2000, "two thousand", "二〇〇〇年"),
        (2009, "two thousand nine", "二〇〇九年"),
        (2010, "twenty ten", "二〇一〇年"),
        (2099, "twenty ninety-nine", "二〇九九年"),
    ],
)
def test_years(year: int, english: str, chinese: str) -> None:
    assert year_to_english(year) == english
    assert year_to_chinese(year) == chinese


def test_years_are_distinct_in_english() -> None:
    assert len({year_to_english(year) for year in range(1900, 2100)}) == 200
    with pytest.raises(ValueError, match=r"year must be in 1900\.\.2099, got 1899"):
        year_to_english(1899)


def test_dates() -> None:
    date = datetime.date(2022, 2, 22)
    assert date_to_english(date) == "February the twenty-second, twenty twenty-two"
    assert (
        date_to_english(date, style=1, weekday=True)
        == "Tuesday, the twenty-second of February, twenty twenty-two"
    )
    assert date_to_chinese(date) == "二〇二二年二月二十二日"
    assert date_to_chinese(date, weekday=True) == "二〇二二年二月二十二日星期二"
    assert date_to_chinese(datetime.date(1999, 12, 12), weekday=True).endswith("十二月十二日星期日")
    assert date_to_english(datetime.date(1999, 10, 30)).startswith("October the thirtieth,")


@pytest.mark.parametrize(
    ("hour", "minute", "style", "half_day", "english", "chinese"),
    [
        (3, 0, 0, False, "three o'clock", "三点"),
        (2, 0, 0, True, "two a.m.", "凌晨两点"),
        (12, 0, 0, False, "twelve o'clock", "十二点"),
        (3, 15, 0, False, "a quarter past three", "三点一刻"),
        (3, 30, 0, False, "half past three", "三点半"),
        (3, 45, 0, False, "a quarter to four", "差一刻四点"),
        (3, 45, 1, False, "three forty-five", "三点四十五分"),
        (3, 5, 0, False, "five past three", "三点零五分"),
        (3, 5, 1, False, "three oh five", "三点零五分"),
        (14, 20, 1, True, "two twenty p.m.", "下午两点二十分"),
        (1, 50, 0, False, "ten to two", "差十分两点"),
        (1, 58, 0, False, "two to two", "差两分两点"),
        (17, 45, 0, True, "a quarter to six p.m.", "下午差一刻六点"),
        (18, 15, 0, True, "a quarter past six p.m.", "晚上六点一刻"),
        (12, 45, 0, True, "a quarter to one p.m.", "中午差一刻一点"),
        (23, 45, 0, True, "a quarter to twelve p.m.", "晚上差一刻十二点"),
        (0, 30, 0, True, "half past twelve a.m.", "凌晨十二点半"),
        (11, 59, 1, True, "eleven fifty-nine a.m.", "上午十一点五十九分"),
    ],
)
def test_times(hour, minute, style, half_day, english, chinese) -> None:
    assert time_to_english(hour, minute, style=style, half_day=half_day) == english
    assert time_to_chinese(hour, minute, style=style, half_day=half_day) == chinese


def test_one_english_time_has_one_chinese() -> None:
    for half_day in (False, True):
        told: dict[str, str] = {}
        for style in (0, 1):
            for hour in range(24):
                for minute in range(60):
                    english = time_to_english(hour, minute, style=style, half_day=half_day)
                    chinese = time_to_chinese(hour, minute, style=style, half_day=half_day)
                    assert told.setdefault(english, chinese) == chinese


def test_pairs_are_distinct_repeatable_and_unambiguous() -> None:
    pairs = generate_pairs(20_000, seed=3)
    assert len({english for english, _ in pairs}) == 20_000
    assert generate_pairs(100, seed=3) == pairs[:100]
    assert generate_pairs(100, seed=4) != pairs[:100]
    # The same sentence drawn in another order has the same translation.
    other = dict(generate_pairs(20_000, seed=5))
    shared = [(english, chinese) for english, chinese in pairs if english in other]
    assert len(shared) > 100
    assert all(other[english] == chinese for english, chinese in shared)


def test_sentences_are_clean_and_can_be_romanized() -> None:
    for english, chinese in generate_pairs(5_000, seed=1):
        assert english.isascii()
        assert english[0].isupper()
        assert english.endswith(".")
        assert ".." not in english
        assert chinese.endswith("。")
        assert " " not in chinese
        assert not re.search(r"[{}a-zA-Z0-9]", chinese)
        assert all(romanize(character) != character for character in chinese)


def test_romanized() -> None:
    assert romanize("两点半。") == "liǎng diǎn bàn ."
