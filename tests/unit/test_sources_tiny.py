"""The tiny models are real ones: loadable, deterministic, and varied where a mistake would hide."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Tokenizer

from megaqwen.config.tiny_shapes import tiny_hf_config
from megaqwen.sources.tiny import write_tiny_model
from megaqwen.sources.tokenizer import train_tokenizer
from megaqwen.sources.verify import verify_model_directory

ARCHITECTURES = ("qwen3", "qwen2", "qwen3_moe", "qwen2_moe")
TEXTS = (
    "The quick brown fox doesn't jump;  it sleeps.\n",
    "def mean(values):\n\treturn sum(values) / len(values)  # 1234\n\n",
    "今天天气很好，我们去公园散步吧。",
    "naïve café 🙂🚀 Привет",
)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never write to it."""
    path = tmp_path_factory.mktemp(architecture)
    write_tiny_model(path, architecture, seed=1234)
    return path


def digest(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


def test_the_same_seed_gives_the_same_bytes(
    tmp_path: Path, architecture: str, directory: Path
) -> None:
    torch.manual_seed(99)  # what the process did before does not matter
    (tmp_path / "again").mkdir()
    (tmp_path / "other").mkdir()
    write_tiny_model(tmp_path / "again", architecture, seed=1234)
    write_tiny_model(tmp_path / "other", architecture, seed=1235)
    first, again, other = (digest(d) for d in (directory, tmp_path / "again", tmp_path / "other"))
    assert first == again
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]


def test_making_a_model_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    write_tiny_model(tmp_path, "qwen3", seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_config_json_says_what_the_shapes_say(architecture: str, directory: Path) -> None:
    config = AutoConfig.from_pretrained(directory)
    facts = tiny_hf_config(architecture)
    assert config.rope_parameters["rope_theta"] == facts.pop("rope_theta")
    assert {key: getattr(config, key) for key in facts} == facts


def test_every_norm_and_bias_differs(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    vectors = [value for value in model.state_dict().values() if value.dim() == 1]
    assert len(vectors) == (17 if "qwen3" in model.config.model_type else 21)
    for index, value in enumerate(vectors):
        assert value.std() > 0.01
        assert not any(torch.equal(value, other) for other in vectors[:index])


def test_the_model_is_whole(architecture: str, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    facts = verify_model_directory(directory)
    assert facts.model_type == architecture
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.dtypes == {"F32": facts.parameters}
    tokens = AutoTokenizer.from_pretrained(directory)(TEXTS[0], return_tensors="pt")
    assert model(**tokens).logits.isfinite().all()


def test_the_tokenizer_loads_as_qwens(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert tokenizer.bos_token is None
    config = AutoConfig.from_pretrained(directory)
    assert config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) < config.vocab_size
    ids = tokenizer.encode("<|im_start|>user<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(ids)[:: len(ids) - 1] == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(tiny_qwen3: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_was_trained(tiny_qwen3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    text = "Return a list of the names of all the attributes of the object."
    assert len(tokenizer.encode(text)) < len(text) / 3


def test_digits_are_tokens_of_their_own(tiny_qwen3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    assert tokenizer.tokenize("2024") == ["2", "0", "2", "4"]


def test_training_is_deterministic() -> None:
    first, again = train_tokenizer(1024), train_tokenizer(1024)
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()


def test_the_chat_template(tiny_qwen3: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == turns
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
