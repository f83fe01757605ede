"""`generate`, `pipeline` and chat templates on saved folders, as a model's reader uses them."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TextGenerationPipeline,
    pipeline,
    set_seed,
)

from llmnorm.training.finetuning import CHAT_TEMPLATE

MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 3},
}


@pytest.fixture
def model(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def generator(folder) -> TextGenerationPipeline:
    return pipeline("text-generation", model=str(folder), device="cpu")


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_changes_no_token(model, ids, mode):
    found = []
    for use_cache in (True, False):
        set_seed(0)
        options = {"max_new_tokens": 12, "pad_token_id": 0, "use_cache": use_cache, **MODES[mode]}
        found.append(model.generate(ids[:2, :9], attention_mask=torch.ones(2, 9), **options))
    assert torch.equal(*found)
    assert found[0].shape[1] > 9


def test_a_pipeline_continues_a_text_as_generate_does(model, generator, tokenizer):
    prompt = "What is 3 plus"
    said = generator(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)
    start = tokenizer(prompt, return_tensors="pt")
    ended = model.generate(**start, max_new_tokens=8, do_sample=False, pad_token_id=0)
    new = ended[0, start["input_ids"].shape[1] :]
    assert said == [{"generated_text": tokenizer.decode(new, skip_special_tokens=True)}]


def test_a_pipeline_of_prompts_of_several_lengths_gives_what_each_gives_alone(generator):
    generator.tokenizer.pad_token = generator.tokenizer.eos_token
    generator.tokenizer.padding_side = "left"
    prompts = ["What", "What is 3 plus 3?", "It is"]
    options = {"max_new_tokens": 8, "do_sample": False}
    together = generator(prompts, batch_size=3, **options)
    assert together == [generator(prompt, **options) for prompt in prompts]


def test_a_pipeline_answers_a_chat_by_the_template(generator, chats):
    chat = chats[0]["messages"][:1]
    with pytest.raises(ValueError, match="chat_template is not set"):
        generator(chat, max_new_tokens=4, do_sample=False)
    generator.tokenizer.chat_template = CHAT_TEMPLATE
    said = generator(chat, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert said[:-1] == chat
    prompt = generator.tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    alone = generator(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert said[-1] == {"role": "assistant", "content": alone[0]["generated_text"]}


@pytest.mark.fast
def test_our_template_opens_with_end_of_text_and_ends_answers_with_it(tokenizer, chats):
    end, chat = tokenizer.eos_token, chats[3]["messages"]
    text = tokenizer.apply_chat_template(chat, chat_template=CHAT_TEMPLATE, tokenize=False)
    assert text == f"{end}<|user|>\nWhat is 3 plus 3?\n<|assistant|>\nIt is 6.{end}\n"
    asked = tokenizer.apply_chat_template(
        chat[:1], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(asked)
    marked = tokenizer.apply_chat_template(
        chat,
        chat_template=CHAT_TEMPLATE,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = zip(marked["input_ids"], marked["assistant_masks"], strict=True)
    assert tokenizer.decode([token for token, trained in pairs if trained]) == f"It is 6.{end}"


def test_a_template_travels_with_the_tokenizer(folder, tmp_path, chats):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat = chats[0]["messages"]
    assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
