"""Errors of data loading that name the file."""
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from replk_mm.data.files import damage, oversize
from replk_mm.errors import UserError


class NamingPipeline:
    """The pipeline of a data set, which names the files of a sample that it fails on. What it returns is the same.

    Args:
        pipeline: Takes and returns the dict of a sample.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def transforms(self) -> list:
        """The steps of the pipeline."""
        return self.pipeline.transforms

    def __call__(self, results: dict) -> Any:
        """Run the pipeline.

        Raises:
            UserError: If a file is cut off, or any step fails.
        """
        files = [str(results[key]) for key in ('img_path', 'seg_map_path') if results.get(key)]
        for file in files:  # decoders fill up a file that is cut off, some without a word
            problem = (damage(Path(file)) or oversize(Path(file))) if Path(file).is_file() else None
            if problem:
                raise UserError(f'{file}: {problem}\nReplace the file, or remove it and its partner from the data set.')
        try:
            return self.pipeline(results)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f'{", ".join(files) or "a sample without a file"}: the data pipeline fails '
                            f'({type(error).__name__}: {error})\n'
                            f'Check the file and its annotations: python tools/check_data.py CONFIG --full') from error


def name_files(loader: DataLoader) -> DataLoader:
    """Let the data sets of a loader name the file that they fail on."""
    for dataset in _with_pipeline(loader.dataset):
        dataset.pipeline = NamingPipeline(dataset.pipeline)
    return loader


def _with_pipeline(dataset: Any) -> Iterator[Any]:
    """The data sets that read files, wrappers (repeat, concatenate) opened."""
    inner = [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]
    if callable(getattr(dataset, 'pipeline', None)):
        yield dataset
    for part in inner:
        if part is not None:
            yield from _with_pipeline(part)
