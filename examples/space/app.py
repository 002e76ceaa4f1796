"""A Space on Hugging Face: a photograph as ids, and back, with the bundled tokenizer.

python examples/space/app.py
"""

import gradio as gr
from PIL import Image

import dyntok
from dyntok.visualize import contact_sheet

tok = dyntok.load()
vocab = dyntok.VisualVocab.of(tok, after=0)  # ids of a language model that has no words


def encode(photo: Image.Image | None, budget: int, learned: bool) -> tuple[Image.Image, str, str]:
    """Returns the contact sheet, the ids and a line about them."""
    if photo is None:
        raise gr.Error("Choose a photograph first.")
    encoding = tok.encode(photo, places=vocab.layout, budget=None if learned else int(budget))
    ids = vocab.to_ids(encoding)[0].tolist()
    kept, patches = len(encoding.codes[0]), int(encoding.grids[0].prod())
    line = f"{kept} of {patches} patches were kept. With their places they are {len(ids)} ids."
    return contact_sheet(tok, [photo], encoding), " ".join(map(str, ids)), line


def decode(text: str) -> Image.Image:
    """Returns the picture of ids, separated by spaces."""
    try:
        return tok.decode(vocab.to_encoding([[int(word) for word in text.replace(",", " ").split()]]))[0]
    except ValueError as error:  # dyntok's errors among them
        raise gr.Error(str(error)) from error


with gr.Blocks(title="dyntok") as page:
    gr.Markdown("# dyntok\nA photograph becomes a short sequence of integers, and a picture again.")
    with gr.Row():
        photo = gr.Image(dyntok.example_image(), type="pil", label="Photograph")
        sheet = gr.Image(label="Original, kept patches, picture from the codes")
    learned = gr.Checkbox(True, label="The tokenizer chooses the length")
    budget = gr.Slider(8, tok.max_tokens, 64, step=1, label="Otherwise, the number of codes")
    encoding = gr.Button("Encode", variant="primary")
    note = gr.Markdown()
    ids = gr.Textbox(label="Ids", lines=3)
    decoding = gr.Button("Decode")
    picture = gr.Image(label="The picture of these ids", elem_id="picture")
    encoding.click(encode, [photo, budget, learned], [sheet, ids, note])
    decoding.click(decode, ids, picture)

if __name__ == "__main__":
    page.launch()
