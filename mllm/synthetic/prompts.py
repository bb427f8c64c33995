"""Holds the words in which the synthetic corpus asks: the synthetic LLM has read them in pre-training.

Knows strings only. A sequence is `<s>`, the media of the user, the user's text, a space, the answer, `</s>`; in a
dialogue the next user text follows that `</s>` directly, and `<s>` stands only once:

    <s> <image> ... </image> what colour is the circle? red </s> how many objects? four </s>
    <s> <audio> ... </audio> <video> ... </video> transcribe speech and video to text. place blue at f two now </s>
"""

SPEECH_TASKS = {
    "transcribe speech to text.": ("audio",),
    "transcribe video to text.": ("video",),
    "transcribe speech and video to text.": ("audio", "video"),
}
DESCRIBE_PROMPT = "describe the picture."
SPEECH_PROMPTS = {media: prompt for prompt, media in SPEECH_TASKS.items()}
MEDIA_MARKERS = {medium: (f"<{medium}>", f"</{medium}>") for medium in ("image", "audio", "video")}
