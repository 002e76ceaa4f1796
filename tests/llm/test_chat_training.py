"""Trainers learn from chats with pictures: `Trainer` of transformers and `SFTTrainer` of TRL."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from support.processors import made  # noqa: E402

from dyntok.llm import extend_model  # noqa: E402

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)


def chats(photos):
    """Pictures that are read, and one that is written."""
    asked = [{"type": "image", "image": photos[0]}, {"type": "text", "text": "what is it?"}]
    drawn = [{"type": "text", "text": "a cat"}, {"type": "image", "image": photos[1]}]
    return [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat on a red chair"}],
        [{"role": "user", "content": "a photograph"}, {"role": "assistant", "content": drawn}],
    ]


@pytest.mark.parametrize("kind", ["trainer", "trl"])
def test_trainers_learn_the_turns_of_the_assistant(kind, tokenizer, photos, tmp_path):
    processor = made(tokenizer, "map", budget=6)
    rows = [
        {name: processor.apply_chat_template(chat, return_tensors=None)[name][0] for name in ("input_ids", "labels")}
        for chat in chats(photos)
    ]
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=processor.vocab.image_start, pad_token_id=1, **SIZES)
    )
    extend_model(model, processor.vocab)
    seen = []
    model.model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True)
    options = dict(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    options |= dict(save_strategy="no", bf16=False, disable_tqdm=True, logging_steps=1)
    collator = transformers.DataCollatorForSeq2Seq(processor.tokenizer, padding=True)  # pads labels with -100
    with torch.no_grad():
        batch = processor.apply_chat_template(chats(photos))
        wanted = float(model(**batch).loss)
    if kind == "trl":
        trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
        data = datasets.Dataset.from_list(rows)
        arguments = trl.SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = trl.SFTTrainer(
            model, arguments, train_dataset=data, processing_class=processor.tokenizer, data_collator=collator
        )
    else:
        arguments = transformers.TrainingArguments(**options)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, abs=1e-3)
    assert sorted(map(tuple, seen[-1].tolist())) == sorted(map(tuple, batch["input_ids"].tolist()))
    learned = batch["input_ids"][batch["labels"] != -100]
    assert int((learned == processor.vocab.image_start).sum()) == 1  # the picture that the assistant writes
