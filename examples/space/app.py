"""A Space on Hugging Face: a photograph as codes, and back, with the bundled tokenizer.

python examples/space/app.py
"""

import gradio as gr
from PIL import Image

import dyntok
from dyntok.visualize import contact_sheet

tok = dyntok.load()


def encode(photo: Image.Image, budget: int, learned: bool) -> tuple[Image.Image, str, str]:
    """Returns the contact sheet, the codes and a line about them."""
    encoding = tok.encode(photo) if learned else tok.encode(photo, budget=int(budget))
    codes = encoding.codes[0].tolist()
    line = f"{len(codes)} of {int(encoding.grids[0].prod())} patches were kept."
    return contact_sheet(tok, [photo], encoding), " ".join(map(str, codes)), line


def decode(text: str) -> Image.Image:
    """Returns the picture of codes, separated by spaces; their places are guessed."""
    try:
        return tok.decode([[int(word) for word in text.replace(",", " ").split()]])[0]
    except ValueError as error:  # dyntok's errors among them
        raise gr.Error(str(error)) from error


with gr.Blocks(title="dyntok") as page:
    gr.Markdown("# dyntok\nA photograph becomes a short sequence of integers, and a picture again.")
    with gr.Row():
        photo = gr.Image(dyntok.example_image(), type="pil", label="Photograph")
        sheet = gr.Image(label="Original, kept patches, picture from the codes")
    learned = gr.Checkbox(True, label="The tokenizer chooses the length")
    budget = gr.Slider(8, tok.max_tokens, 64, step=1, label="Otherwise, the number of codes")
    note = gr.Markdown()
    codes = gr.Textbox(label="Codes", lines=3)
    with gr.Row():
        gr.Button("Encode", variant="primary").click(encode, [photo, budget, learned], [sheet, codes, note])
        picture = gr.Image(label="From the codes alone")
        gr.Button("Decode").click(decode, codes, picture)

if __name__ == "__main__":
    page.launch()
