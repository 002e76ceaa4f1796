"""The progress bar of the commands. A command imports it when it runs, because importing tqdm takes time."""

from tqdm import tqdm


class ProgressBar(tqdm):
    """A progress bar that leaves no thread behind: tqdm would start one that watches the bars and never ends."""

    monitor_interval = 0
