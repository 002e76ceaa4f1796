"""Fine-tune a small language model of Hugging Face on captions and pictures, in both directions.

    dyntok batch "captioned/*.tar" codes/ --keep-columns txt
    python examples/finetune.py codes/ --model Qwen/Qwen3-0.6B -o model/

Afterwards `model/` holds model, tokenizer and dyntok.json, and vLLM serves it as it is.
"""

import argparse
from functools import partial

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import dyntok
from dyntok.llm import (
    PackedDataset,
    Packer,
    check_packing,
    extend_model,
    extend_tokenizer,
    in_drawn_order,
    read_documents,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes")
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--text", default="txt", help="the column with the captions")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("-o", "--output", default="model")
    args = parser.parse_args()

    tok = dyntok.load()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    vocab = dyntok.VisualVocab.of(tok, after=len(tokenizer))
    extend_tokenizer(tokenizer, vocab)
    extend_model(model, vocab, init=tok.codebook.embedding)
    check_packing(model)

    encode = partial(tokenizer.encode, add_special_tokens=False)
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def documents(epoch: int):
        found = read_documents(args.codes, text=args.text, positions=vocab.layout != "none", epoch=epoch)
        return (in_drawn_order(document, epoch=epoch) for document in found)

    rows = PackedDataset(documents, lambda: Packer(args.length, vocab, encode, bos=None, eos=end, pad=pad))
    training = TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        warmup_steps=min(100, args.steps // 10),
        lr_scheduler_type="cosine",
        logging_steps=max(1, args.steps // 100),
        save_strategy="no",
        report_to=[],
    )
    Trainer(model, training, train_dataset=rows).train()
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    vocab.save_pretrained(args.output)


if __name__ == "__main__":
    main()
