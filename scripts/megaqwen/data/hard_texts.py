"""Texts on which tokenizers have been seen to differ: scripts, code, white space, markup."""

from collections.abc import Iterable, Iterator

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. It's 3.14159, isn't it? WE'LL SEE; I'D'VE.",
    "Größere Übergänge: straße, ÇA VA, naïve café, coöperate, fiancée, Ångström, Łódź, İstanbul ısı.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ѣ ѳ Ѵ",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΆΈΉΊΌΎΏ ς",
    "今天天气很好，我们去公园散步吧。「你好」——他说：２０２６年１１月２４日。㐀㐁 𠀀𠮷",
    "いろはにほへと ちりぬるを カタカナ ｶﾀｶﾅ がぎぐ か\u3099き\u3099 々〆",
    "다람쥐 헌 쳇바퀴에 타고파 \u1112\u1161\u11ab\u1100\u1173\u11af ㄱㄴㄷ",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب ١٢٣٤ \u202bRTL\u202c لَا",
    "עטלף אבק נס דרך מזגן שהתפוצץ שָׁלוֹם ״גרשיים״",
    "ऋषियों को सताने वाले दुष्ट राक्षसों क्षि ज्ञ १२३ বাংলা ৪৫ தமிழ் తెలుగు ಕನ್ನಡ മലയാളം",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓ ລາວ မြန်မာ ខ្មែរ བོད་ཡིག ქართული Հայերեն አማርኛ ᏣᎳᎩ ᚠᛇᚻ",
    "😀😃 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 👍🏽 ☺️ ❤ © ™ ½ ² ₃ Ⅷ ① ㊗ 🄰 𝒜𝔅𝟘 ﬁ ﬃ Ǆ",
    "e\u0301 é e\u0301\u0327 a\u0323\u0302 \u0344 \u212b \u2126 \uf900 \u1e9b\u0323 q\u0307\u0323 \u0958",
    "ſ'ſ 'ſ IT'ſ \u212a 'S 'T 'RE 'VE 'M 'LL 'D 's't're've'm'll'd ’s ’t ‘ll can’t o'clock''s",
)
CODE = (
    "def f(x: int = 0x1F) -> dict[str, Any]:\n    return {'a': x ** 2, \"b\": [*range(10)]}  # ok\n",
    '\tif (a!=b && c->d[i++] <= ~0x7fffffffUL) {\r\n\t\tprintf("%-5s|%08.3f\\n", s, 1e-9);\r\n\t}\r\n',
    '<a href="https://example.org/x?y=1&amp;z=%20#top">t</a><!-- c --><?php echo $x; ?>',
    "SELECT COUNT(*) FROM t WHERE x LIKE '%a_b%';--\nUPDATE t SET y=NULL;",
    "$$\\int_0^\\infty e^{-x^2}\\,dx=\\frac{\\sqrt\\pi}{2}$$ \\\\ \\begin{matrix}",
    "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHxgljNBAAO9TXL0Y4OHw==",
    "::1 127.0.0.1:8080 user@host:~$ sudo rm -rf /tmp/* 2>&1 | grep -v '^#' >> ~/.log",
    "camelCaseHTTPServer snake_case_name SCREAMING_CASE kebab-case v1.2.3-rc.4+build.567",
    "1234567890 12 345 6789 1,234,567.89 -0 +1 0b1010 1_000_000 ١٢٣ १२ １２３ ²³",
)
SPACES = (
    " ",
    "  ",
    "   a",
    "a   ",
    "a  b   c    d",
    "\n",
    "\n\n\n",
    "a\n",
    "a\n\n b",
    "a \n \n b\r\r\nc\r",
    "\t\t a\t\tb\t \t",
    " \u00a0\u2003\u3000\u2009x\u00a0y\u2028z\u2029w\u0085v\u200bu\ufefft\u180es",
    "a\x0bb\x0cc\x1cd\x1de\x1ef\x1fg\x00h\x7fi",
    "     \n     \n  x",
    "x" + " " * 300 + "y" + "\n" * 300 + "z" + "\t" * 300,
)
LONG = (
    "a" * 3000,
    "ab" * 1500,
    "7" * 1000,
    "-" * 1000 + "=" * 999,
    "!?" * 500,
    "天" * 1000,
    "😀" * 300,
    "e\u0301" * 300,
    "\u0301" * 100,
    " word" * 500,
    "A" + "\u0300\u0316" * 50,
    "'s" * 200,
)
MARKUP = (
    "<|endoftext|>",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<think>\n\n</think>\n\nYes.<tool_call>{}</tool_call>",
    "<|endoftext|><|endoftext|>a<|endoftext|",
    "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|><|vision_start|><|image_pad|>",
    "< |im_end|> <|im_end| ><|IM_END|>",
)
HARD_TEXTS = (*SENTENCES, *CODE, *SPACES, *LONG, *MARKUP)


def around(tokens: Iterable[str]) -> Iterator[str]:
    """Texts in which a token's own characters stand alone, twice, and between others."""
    for token in tokens:
        yield from (token, token * 2, f"a{token}b", f" {token} {token}\n", token[:-1], token[1:])
        yield from (f"e\u0301{token}\u0301", f"1{token}2", f"\n\n{token}\n\n")
