"""Documents in packed rows do not see each other, in every architecture that the docs name."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

transformers = pytest.importorskip("transformers")

from dyntok import ConfigError, VisualVocab  # noqa: E402
from dyntok.llm import (  # noqa: E402
    Document,
    ImageCodes,
    PackedDataset,
    Packer,
    check_packing,
    collate_rows,
    document_leak,
    flatten_rows,
)

VOCAB = VisualVocab.after(300, size=50)
SIZE = VOCAB.vocab_size
SMALL = dict(
    vocab_size=SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=292,
)
WITHOUT_HEAD_DIM = {name: value for name, value in SMALL.items() if name != "head_dim"}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**WITHOUT_HEAD_DIM),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=8),
    "gemma": lambda: transformers.GemmaConfig(**SMALL),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, sliding_window=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(**WITHOUT_HEAD_DIM),
    "olmo2": lambda: transformers.Olmo2Config(**WITHOUT_HEAD_DIM),
    "smollm3": lambda: transformers.SmolLM3Config(**WITHOUT_HEAD_DIM),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


def model_of(config, attention=None):
    torch.manual_seed(0)
    options = {} if attention is None else {"attn_implementation": attention}
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def dataset(first, **options):
    """Rows of three documents each; the first document of every row comes from the argument."""
    others = [Document("b", ("second", ImageCodes([4, 5, 6]))), Document("c", ("the third",))]
    documents = [Document("a", (first, ImageCodes([1, 2, 3]))), *others]

    def packer():
        return Packer(48, VOCAB, lambda text: list(text.encode()), bos=290, eos=291, pad=292)

    return PackedDataset(lambda epoch: documents * 2, packer, **options)


def documents(first):
    """The ids of the same documents, one by one."""
    rows = [inputs.row for inputs in dataset(first)]
    return [row.input_ids[row.document == n].tolist() for row in rows for n in range(int(row.document.max()) + 1)]


def batches(**loader):
    """Two batches that differ in the first of the three documents alone."""
    options = {"mask": loader.pop("mask")} if "mask" in loader else {}
    return [next(iter(DataLoader(dataset(text, **options), batch_size=2, **loader))) for text in ("first", "FIRST")]


def unchanged(one, other):
    """Which tokens belong to documents that are the same in both batches: bool [B, L]."""
    numbers = (one["position_ids"] == 0).cumsum(1)
    same = torch.empty_like(numbers, dtype=torch.bool)
    for row, document in enumerate(numbers):
        same[row] = ~torch.isin(document, document[one["input_ids"][row] != other["input_ids"][row]])
    assert same.any() and not same.all()
    return same


def leak(one, other, first, second):
    """The largest change of the logits where nothing changed; the rest must change."""
    same, change = unchanged(one, other), (first - second).abs()
    assert change[~same].max() > 1e-3
    return change[same].max()


LOADERS = {
    "default": {},
    "collated": {"collate_fn": collate_rows},
    "masked": {"mask": torch.float32},
    "flattened": {"collate_fn": flatten_rows},
}


@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_neighbor_changes_nothing(name, attention):
    model = model_of(CONFIGS[name](), attention)
    for loader in LOADERS.values():
        one, other = batches(**loader)
        with torch.no_grad():
            assert leak(one, other, model(**one).logits, model(**other).logits) < 1e-5
    check_packing(model)
    check_packing(model, mask=torch.float32)


def test_batches_are_plain_and_workers_make_them_too():
    alone, parallel = (next(iter(DataLoader(dataset("first"), batch_size=1, num_workers=n))) for n in (0, 1))
    assert type(alone) is type(parallel) is dict and alone["use_cache"] is parallel["use_cache"] is False
    assert torch.equal(alone["input_ids"], parallel["input_ids"])


def test_accelerate_gives_every_process_its_part_of_the_rows():
    """What `dispatch_batches=False` makes of the data set, without rank and world. The epoch reaches it, too."""
    shard_of = pytest.importorskip("accelerate.data_loader").IterableDatasetShard
    found = []
    for process in range(2):
        data = dataset("first")
        shard = shard_of(data, batch_size=1, num_processes=2, process_index=process)
        shard.set_epoch(7)
        (batch,) = DataLoader(shard, batch_size=1)
        assert data.epoch == 7 and batch["use_cache"] is False
        found.append(batch["input_ids"][0])
    assert torch.equal(torch.stack(found), torch.stack([row["input_ids"] for row in dataset("first")]))


def test_a_cache_would_let_documents_leak():
    """What the rows protect from: without `use_cache=False` transformers does not look for packed documents."""
    model = model_of(CONFIGS["llama"]())
    one, other = batches()
    with torch.no_grad():
        logits = [model(**{**batch, "use_cache": True}).logits for batch in (one, other)]
    assert leak(one, other, *logits) > 1e-3


@pytest.mark.parametrize("mask", [torch.bool, torch.int64, "float32"])
def test_masks_are_floating_point(mask):
    with pytest.raises(ConfigError, match="expected the floating-point dtype"):
        dataset("first", mask=mask)


def test_models_that_leak_are_refused():
    opt = transformers.OPTConfig(
        vocab_size=SIZE, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    bloom = transformers.BloomConfig(vocab_size=SIZE, hidden_size=32, n_layer=2, n_head=4)
    qwen_vl = transformers.Qwen2VLConfig(
        text_config=WITHOUT_HEAD_DIM | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
    )
    vision = transformers.Qwen2VLForConditionalGeneration(qwen_vl)
    for model in (model_of(opt), model_of(bloom), vision):
        with pytest.raises(ConfigError, match="packed documents see each other .* try mask=torch.float32"):
            check_packing(model)
    with pytest.raises(ConfigError, match="OPTForCausalLM lets packed documents"):
        check_packing(model_of(opt).bfloat16())
    check_packing(model_of(CONFIGS["llama"]()).bfloat16())
    for model in (model_of(opt), vision):
        check_packing(model, mask=torch.float32)
    with pytest.raises(ConfigError, match="BloomForCausalLM .* give it one document per row"):
        check_packing(model_of(bloom), mask=torch.float32)


def test_recurrent_models_are_refused():
    config = transformers.MambaConfig(vocab_size=SIZE, hidden_size=32, num_hidden_layers=2, state_size=4)
    for mask in (None, torch.float32):
        with pytest.raises(ConfigError, match="one document per row"):
            check_packing(model_of(config), mask=mask)


class ApartAlone(torch.nn.Module):
    """As flash attention of transformers, which looks for packed documents in a batch of one row alone."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(SIZE, 8)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, position_ids, use_cache):
        document = (position_ids == 0).cumsum(1)
        if len(input_ids) > 1:
            document = torch.zeros_like(document)
        seen = (document[:, :, None] == document[:, None]).float().tril()
        return SimpleNamespace(logits=seen @ self.embedding(input_ids) @ self.embedding.weight.T)


def test_a_model_that_keeps_documents_apart_in_a_batch_of_one_row_alone_is_refused():
    model = ApartAlone()
    with pytest.raises(ConfigError, match="packed documents see each other .* collate_fn=flatten_rows"):
        check_packing(model)
    check_packing(model, batch_size=1)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        document_leak(model, batch_size=0)


def test_the_measure_restores_the_mode():
    model = model_of(CONFIGS["llama"]()).train()
    assert document_leak(model) < 1e-5 and model.training


def test_flattened_rows_have_the_borders_of_flash_attention():
    batch = flatten_rows(list(dataset("first")))
    bounds, starts = batch["cu_seq_lens_q"].tolist(), (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and bounds == [*starts, batch["input_ids"].shape[1]]
    assert batch["max_length_q"] == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    assert 292 not in batch["input_ids"]


def rows_of_epochs(data, epochs):
    """As the docs have it for TRL, whose trainer does not know `data` itself."""
    for epoch in range(epochs):
        data.set_epoch(epoch)
        yield from data


@pytest.mark.parametrize("kind", ["trainer", "default-collator", "trl", "trl packs"])
def test_trainers_keep_documents_apart(kind, tmp_path):
    """What the decoder computes inside a trainer, for two neighbors."""
    calls = []

    def record(decoder, args, inputs, output):
        calls.append((inputs, output.last_hidden_state))

    options = dict(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    options |= dict(save_strategy="no", remove_unused_columns=False, bf16=False, disable_tqdm=True)
    collator = {} if kind == "default-collator" else {"data_collator": collate_rows}
    for text in ("first", "FIRST"):
        model = model_of(CONFIGS["llama"]())
        model.model.register_forward_hook(record, with_kwargs=True)
        if kind == "trl":
            trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
            rows = datasets.IterableDataset.from_generator(partial(rows_of_epochs, dataset(text), 2))
            arguments = trl.SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True})
            trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=_tokenizer(), **collator)
        elif kind == "trl packs":
            trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
            rows = datasets.Dataset.from_list([{"input_ids": ids} for ids in documents(text)])
            arguments = trl.SFTConfig(**options, packing=True, max_length=48)
            trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=_tokenizer())
        else:
            arguments = transformers.TrainingArguments(**options)
            trainer = transformers.Trainer(model, arguments, train_dataset=dataset(text), **collator)
        trainer.train()
    (one, first), (other, second) = calls
    assert leak(one, other, first, second) < 1e-5


def _tokenizer():
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 292, "</s>": 291}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
