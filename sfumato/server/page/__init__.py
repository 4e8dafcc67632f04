"""The web page: a Gradio form on the desk, at /page. `form` and `watching` know no Gradio, `blocks` lays out."""
