"""English sentences with numbers, dates and times in words, and their Chinese translations.

Pairs are exact by construction: every English sentence has one right translation, so the part of
a test set that a model translates exactly says how well it learned, with no reference to argue
about. There are vastly more sentences than a training set holds, and a model must learn how the
two languages count (English groups digits by three, Chinese by four) to translate the rest.

Conventions, where Chinese leaves a choice:

- Numbers: 零 stands for zeros between digits, once however many they are (1,005 一千零五;
  100,020 十万零二十), and between groups of four digits when the lower one is below 1,000
  (20,300 两万零三百, but 23,000 两万三千; no 零 after a group that ends in zero: 203,000 is
  二十万三千). 10 to 19 begin with 十 at the start of a number and of its 万 and 亿 groups at the
  start (15 十五; 150,000 十五万) and with 一十 elsewhere (115 一百一十五).
- Two is 两 before 千, before 万 and 亿 when they count exactly two, before a measure word, and at
  two o'clock; else 二 (二百, 二十, 十二).
- Years are read digit by digit, with 〇 for zero; days of the month end in 日; Sunday is 星期日.
- "a quarter to six p.m." is 5:45 p.m.: a.m. and p.m. tell the half of the day of that time.
- Times: :15 is 一刻, :30 半, :45 told from the next hour is 差一刻; minutes below ten take 零.
  Parts of the day by the time told: 凌晨 12–5 a.m., 上午 6–11 a.m., 中午 12 p.m., 下午 1–5 p.m.,
  晚上 6–11 p.m. Noon is 中午十二点, midnight 午夜十二点.
- Chinese sentences use full-width punctuation and no spaces.

Dates carry their true weekday.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from dataclasses import dataclass

MAX_NUMBER = 999_999_999_999


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONES = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS = _words("- - twenty thirty forty fifty sixty seventy eighty ninety")
_SCALES = ((1_000_000_000, "billion"), (1_000_000, "million"), (1_000, "thousand"))
_ORDINALS = _words(
    "- first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
)
_MONTHS = _words(
    "- January February March April May June July August September October November December"
)
_WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_DIGITS = "零一二三四五六七八九"
_UNITS = ("", "十", "百", "千")
_GROUPS = ("", "万", "亿")
_CHINESE_WEEKDAYS = "一二三四五六日"


def number_to_english(number: int, *, with_and: bool = False) -> str:
    """Write a number in English words: 1,205 is "one thousand two hundred five".

    Args:
        number: 0 to 999,999,999,999.
        with_and: British: "one thousand two hundred and five".

    Raises:
        ValueError: The number is out of range.
    """
    _check_number("number_to_english", number)
    if number < 20:
        return _ONES[number]
    words: list[str] = []
    for scale, name in _SCALES:
        if number >= scale:
            words += [_below_thousand(number // scale, with_and), name]
            number %= scale
    if number:
        if with_and and words and number < 100:
            words.append("and")
        words.append(_below_thousand(number, with_and))
    return " ".join(words)


def number_to_chinese(number: int, *, measured: bool = False) -> str:
    """Write a number in Chinese characters: 1,205 is 一千二百零五.

    Args:
        number: 0 to 999,999,999,999.
        measured: A measure word follows, before which two is 两.

    Raises:
        ValueError: The number is out of range.
    """
    _check_number("number_to_chinese", number)
    if number == 0:
        return _DIGITS[0]
    if number == 2 and measured:
        return "两"
    text = ""
    skipped = False
    for index in (2, 1, 0):
        group = number // 10_000**index % 10_000
        if not group:
            skipped = bool(text)
            continue
        # A zero is heard when places are skipped between two digits, across groups too; zeros
        # that end the group before are not.
        if text and (skipped or group < 1_000):
            text += _DIGITS[0]
        text += "两" if group == 2 and index else _chinese_group(group, leading=not text)
        text += _GROUPS[index]
        skipped = False
    return text


def year_to_english(year: int) -> str:
    """Read a year from 1900 to 2099: "nineteen oh five", "two thousand nine", "twenty ten".

    Raises:
        ValueError: The year is out of range.
    """
    if not 1900 <= year <= 2099:
        raise ValueError(f"year_to_english: year must be in 1900..2099, got {year}")
    century, rest = divmod(year, 100)
    if year // 10 == 200:
        return number_to_english(year)
    if rest == 0:
        return f"{_ONES[century]} hundred"
    head = number_to_english(century)
    return f"{head} oh {_ONES[rest]}" if rest < 10 else f"{head} {number_to_english(rest)}"


def year_to_chinese(year: int) -> str:
    """Read a year digit by digit: 2005 is 二〇〇五年."""
    return "".join("〇" if digit == "0" else _DIGITS[int(digit)] for digit in str(year)) + "年"


def date_to_english(date: datetime.date, *, style: int = 0, weekday: bool = False) -> str:
    """Write a date: "March the third, twenty ten", or in style 1 "the third of March, …"."""
    day = _ordinal(date.day)
    month = _MONTHS[date.month]
    text = f"the {day} of {month}" if style else f"{month} the {day}"
    prefix = f"{_WEEKDAYS[date.weekday()]}, " if weekday else ""
    return f"{prefix}{text}, {year_to_english(date.year)}"


def date_to_chinese(date: datetime.date, *, weekday: bool = False) -> str:
    """Write a date: 二〇一〇年三月三日, with 星期三 behind it when the weekday is told."""
    text = year_to_chinese(date.year)
    text += f"{number_to_chinese(date.month)}月{number_to_chinese(date.day)}日"
    return text + (weekday_to_chinese(date.weekday()) if weekday else "")


def weekday_to_chinese(weekday: int) -> str:
    """Return the name of a day of the week, 0 for Monday."""
    return f"星期{_CHINESE_WEEKDAYS[weekday]}"


def time_to_english(hour: int, minute: int, *, style: int = 0, half_day: bool = False) -> str:
    """Tell the time: "half past three", or in style 1 "three thirty".

    Args:
        hour: 0 to 23.
        minute: 0 to 59.
        style: 0 with "past" and "to", 1 with bare numbers.
        half_day: Add "a.m." or "p.m.".
    """
    mark = (" a.m." if hour < 12 else " p.m.") if half_day else ""
    this, following = _clock(hour), _clock(hour + 1)
    if minute == 0:
        text = this if half_day else f"{this} o'clock"
    elif style == 1:
        minutes = f"oh {_ONES[minute]}" if minute < 10 else number_to_english(minute)
        text = f"{this} {minutes}"
    elif minute == 30:
        text = f"half past {this}"
    elif minute < 30:
        text = f"{_past(minute)} past {this}"
    else:
        text = f"{_past(60 - minute)} to {following}"
    return text + mark


def time_to_chinese(hour: int, minute: int, *, style: int = 0, half_day: bool = False) -> str:
    """Tell the time: 三点半, or in style 1 三点三十分; the arguments of ``time_to_english``."""
    mark = _part_of_day(hour) if half_day else ""
    this, following = _chinese_clock(hour), _chinese_clock(hour + 1)
    if minute == 0:
        text = this
    elif style == 0 and minute == 30:
        text = f"{this}半"
    elif style == 0 and minute == 15:
        text = f"{this}一刻"
    elif style == 0 and minute > 30:
        left = 60 - minute
        text = f"差{'一刻' if left == 15 else _chinese_minutes(left)}{following}"
    else:
        zero = _DIGITS[0] if minute < 10 else ""
        text = f"{this}{zero}{number_to_chinese(minute)}分"
    return mark + text


def romanize(text: str) -> str:
    """Write Chinese of these sentences in pinyin, one syllable a character, spaced.

    For places that cannot show Chinese, like a plot on a machine without a Chinese font.
    Characters that these sentences do not have stay as they are.
    """
    return " ".join(_PINYIN.get(character, character) for character in text)


def generate_pairs(count: int, *, seed: int = 0) -> list[tuple[str, str]]:
    """Return distinct pairs of an English sentence and its Chinese translation.

    No English sentence comes twice, so any division of the list gives disjoint sets: take the
    test set from the end.

    Args:
        count: How many.
        seed: The same seed gives the same pairs.
    """
    choose = random.Random(seed)
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        template = choose.choice(_TEMPLATES)
        fillings = [_FILLERS[name](choose) for name in template.fillers]
        english = template.english.format(*(english for english, _ in fillings))
        chinese = template.chinese.format(*(chinese for _, chinese in fillings))
        # "p.m." at the end needs no second full stop.
        pairs[english[0].upper() + english[1:].replace("..", ".")] = chinese
    return list(pairs.items())


def _check_number(name: str, number: int) -> None:
    if not 0 <= number <= MAX_NUMBER:
        raise ValueError(f"{name}: number must be in 0..{MAX_NUMBER}, got {number}")


def _below_hundred(number: int) -> str:
    if number < 20:
        return _ONES[number]
    tens, ones = divmod(number, 10)
    return f"{_TENS[tens]}-{_ONES[ones]}" if ones else _TENS[tens]


def _below_thousand(number: int, with_and: bool) -> str:
    hundreds, rest = divmod(number, 100)
    if not hundreds:
        return _below_hundred(rest)
    text = f"{_ONES[hundreds]} hundred"
    if not rest:
        return text
    return f"{text} {'and ' if with_and else ''}{_below_hundred(rest)}"


def _chinese_group(group: int, *, leading: bool) -> str:
    """Write 1 to 9,999; ``leading`` when nothing stands before it."""
    text = ""
    zeros = False
    for power in (3, 2, 1, 0):
        digit = group // 10**power % 10
        if not digit:
            zeros = bool(text)
            continue
        text += _DIGITS[0] if zeros else ""
        zeros = False
        if digit == 1 and power == 1 and leading and not text:
            text += _UNITS[power]
        else:
            text += ("两" if digit == 2 and power == 3 else _DIGITS[digit]) + _UNITS[power]
    return text


def _ordinal(day: int) -> str:
    if day <= 20:
        return _ORDINALS[day]
    if day == 30:
        return "thirtieth"
    return f"{_TENS[day // 10]}-{_ORDINALS[day % 10]}"


def _clock(hour: int) -> str:
    return _ONES[hour % 12 or 12]


def _chinese_clock(hour: int) -> str:
    return number_to_chinese(hour % 12 or 12, measured=True) + "点"


def _past(minutes: int) -> str:
    return "a quarter" if minutes == 15 else number_to_english(minutes)


def _chinese_minutes(minutes: int) -> str:
    return "一刻" if minutes == 15 else f"{number_to_chinese(minutes, measured=True)}分"


def _part_of_day(hour: int) -> str:
    if hour < 6:
        return "凌晨"
    if hour < 12:
        return "上午"
    if hour == 12:
        return "中午"
    return "下午" if hour < 18 else "晚上"


@dataclass(frozen=True)
class _Template:
    """A sentence in both languages, with numbered gaps and what fills them."""

    english: str
    chinese: str
    fillers: tuple[str, ...]


_PEOPLE = (
    ("I", "我"),
    ("you", "你"),
    ("he", "他"),
    ("she", "她"),
    ("we", "我们"),
    ("they", "他们"),
    ("my mother", "我妈妈"),
    ("the teacher", "老师"),
)
_THINGS = (
    ("book", "books", "本书"),
    ("ticket", "tickets", "张票"),
    ("apple", "apples", "个苹果"),
    ("chair", "chairs", "把椅子"),
    ("cat", "cats", "只猫"),
    ("car", "cars", "辆汽车"),
    ("letter", "letters", "封信"),
    ("bottle of water", "bottles of water", "瓶水"),
    ("tree", "trees", "棵树"),
)
_TEMPLATES = (
    _Template("the number is {0}.", "这个数是{0}。", ("number",)),
    _Template("the answer is {0}.", "答案是{0}。", ("number",)),
    _Template("the house costs {0} yuan.", "这座房子值{0}元。", ("amount",)),
    _Template("the city has {0} inhabitants.", "这座城市有{0}个居民。", ("inhabitants",)),
    _Template("there are {0} here.", "这里有{0}。", ("several things",)),
    _Template("{0} bought {1}.", "{0}买了{1}。", ("person", "things")),
    _Template("{0} bought {1} on {2}.", "{0}{2}买了{1}。", ("person", "things", "weekday")),
    _Template("{0} sold {1} on {2}.", "{0}{2}卖了{1}。", ("person", "things", "date")),
    _Template("today is {0}.", "今天是{0}。", ("full date",)),
    _Template("{0} arrived on {1}.", "{0}{1}到了。", ("person", "date")),
    _Template("it is {0} now.", "现在是{0}。", ("time",)),
    _Template("{0} got up at {1}.", "{0}{1}起床。", ("person", "time")),
    _Template("the train leaves at {0}.", "火车{0}出发。", ("time",)),
    _Template("the shop opens on {0} at {1}.", "商店{0}{1}开门。", ("weekday", "time")),
    _Template("the film begins on {0} at {1}.", "电影{0}{1}开始。", ("full date", "time")),
)


def _any_number(choose: random.Random, low: int = 0, digits: int = 9) -> int:
    """Draw a number whose length is uniform; of every third, most digits are zero."""
    length = choose.randint(1, digits)
    number = choose.randint(10 ** (length - 1), 10**length - 1)
    if choose.random() < 1 / 3:
        for power in range(length - 1):
            if choose.random() < 0.7:
                number -= number // 10**power % 10 * 10**power
    return max(low, number if length > 1 or choose.random() < 0.9 else 0)


def _number(choose: random.Random) -> tuple[str, str]:
    number = _any_number(choose)
    return number_to_english(number, with_and=choose.random() < 0.5), number_to_chinese(number)


def _amount(choose: random.Random, digits: int) -> tuple[str, str]:
    number = _any_number(choose, low=2, digits=digits)
    english = number_to_english(number, with_and=choose.random() < 0.5)
    return english, number_to_chinese(number, measured=True)


def _things(choose: random.Random, low: int = 1) -> tuple[str, str]:
    number = _any_number(choose, low=low, digits=3)
    singular, plural, chinese = choose.choice(_THINGS)
    english = number_to_english(number, with_and=choose.random() < 0.5)
    noun = singular if number == 1 else plural
    return f"{english} {noun}", number_to_chinese(number, measured=True) + chinese


def _date(choose: random.Random, weekday: bool = False) -> tuple[str, str]:
    first, last = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
    date = datetime.date.fromordinal(choose.randint(first.toordinal(), last.toordinal()))
    english = date_to_english(date, style=choose.randint(0, 1), weekday=weekday)
    return english, date_to_chinese(date, weekday=weekday)


def _weekday(choose: random.Random) -> tuple[str, str]:
    weekday = choose.randrange(7)
    return _WEEKDAYS[weekday], weekday_to_chinese(weekday)


def _time(choose: random.Random) -> tuple[str, str]:
    if choose.random() < 0.05:
        return choose.choice((("noon", "中午十二点"), ("midnight", "午夜十二点")))
    hour = choose.randrange(24)
    minute = choose.choice((0, 15, 30, 45)) if choose.random() < 0.3 else choose.randrange(60)
    style, half_day = choose.randint(0, 1), choose.random() < 0.6
    return (
        time_to_english(hour, minute, style=style, half_day=half_day),
        time_to_chinese(hour, minute, style=style, half_day=half_day),
    )


_FILLERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "number": _number,
    "amount": lambda choose: _amount(choose, digits=9),
    "inhabitants": lambda choose: _amount(choose, digits=8),
    "things": _things,
    "several things": lambda choose: _things(choose, low=2),
    "person": lambda choose: choose.choice(_PEOPLE),
    "date": _date,
    "full date": lambda choose: _date(choose, weekday=True),
    "weekday": _weekday,
    "time": _time,
}

_PINYIN = dict(
    entry.split(":")
    for entry in _words(
        "零:líng 〇:líng 一:yī 二:èr 两:liǎng 三:sān 四:sì 五:wǔ 六:liù 七:qī 八:bā 九:jiǔ "
        "十:shí 百:bǎi 千:qiān 万:wàn 亿:yì 年:nián 月:yuè 日:rì 星:xīng 期:qī 点:diǎn 分:fēn "
        "刻:kè 半:bàn 差:chà 凌:líng 晨:chén 上:shàng 午:wǔ 中:zhōng 下:xià 晚:wǎn 夜:yè "
        "这:zhè 个:gè 数:shù 是:shì 答:dá 案:àn 座:zuò 房:fáng 子:zi 值:zhí 元:yuán 城:chéng "
        "市:shì 有:yǒu 居:jū 民:mín 里:lǐ 买:mǎi 了:le 卖:mài 今:jīn 天:tiān 到:dào 现:xiàn "
        "在:zài 起:qǐ 床:chuáng 火:huǒ 车:chē 出:chū 发:fā 商:shāng 店:diàn 开:kāi 门:mén "
        "电:diàn 影:yǐng 始:shǐ 我:wǒ 你:nǐ 他:tā 她:tā 们:men 妈:mā 老:lǎo 师:shī 本:běn "
        "书:shū 张:zhāng 票:piào 苹:píng 果:guǒ 把:bǎ 椅:yǐ 只:zhī 猫:māo 辆:liàng 汽:qì "
        "封:fēng 信:xìn 瓶:píng 水:shuǐ 棵:kē 树:shù 。:."
    )
)
