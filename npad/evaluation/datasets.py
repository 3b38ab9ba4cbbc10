"""The MVTec AD layout of a data set.

    <category>/train/good/*                            defect-free images to fit
    <category>/test/good/*, test/<type>/*              images to score
    <category>/ground_truth/<type>/<name>_mask.png     where the defects are (or <name>.png)
    <category>/ground_truth/<type>/<name>/*            several masks of one image

``train``, ``test``, ``ground_truth`` and ``good`` are found in any case; what is called otherwise in
the place of ``good`` must be named. A category may have no masks at all; then only whole images can
be measured.

Source: Bergmann, Fauser, Sattlegger, Steger, *MVTec AD*, CVPR 2019.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from npad.evaluation.folder_names import looks_bad, looks_good
from npad.file_names import shown
from npad.images.folders import is_litter, search, warn_of_left_out

__all__ = [
    "Category",
    "DatasetError",
    "Sample",
    "find_bad",
    "find_categories",
    "find_good",
    "refuse_masks",
]

GOOD = "good"
TRAIN, TEST, GROUND_TRUTH = PARTS = ("train", "test", "ground_truth")
_NAMED = 3  # of the images without a mask that an error lists

_MASK_NAME = re.compile(r"(.+)[-_. ](mask|gt|groundtruth|ground_truth|label|seg)s?[-_]?\d*", re.I)
_MASK_FOLDER = re.compile(r"gt|((gt|binary|defect|segmentation|truth)?masks?)|groundtruths?")


class DatasetError(ValueError):
    """A data set that does not follow the layout.

    Attributes
    ----------
    path : Path
        The file or folder at fault.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """One test image.

    Attributes
    ----------
    path : Path
    defect_type : str
        ``"good"``, whatever its folder is called, or the name of its folder below ``test``.
    mask_path : Path or None
        Where the defect is: a file, or a folder of several whose union it is. A good image needs none.
    """

    path: Path
    defect_type: str
    mask_path: Path | None

    @property
    def is_anomalous(self) -> bool:
        """Whether the image shows a defect."""
        return self.defect_type != GOOD


@dataclass(frozen=True)
class Category:
    """One kind of object or texture: what to fit and what to score, both sorted by path.

    Raises
    ------
    DatasetError
        Some defective images have a mask and others have none.
    """

    name: str
    train: list[Path]
    test: list[Sample]

    def __post_init__(self) -> None:
        defects = [sample for sample in self.test if sample.is_anomalous]
        missing = [sample for sample in defects if sample.mask_path is None]
        if not 0 < len(missing) < len(defects):
            return
        first, *others = missing
        named = [str(sample.path) for sample in others[:_NAMED]]
        named += [f"{len(others) - _NAMED} more"] if len(others) > _NAMED else []
        raise DatasetError(
            first.path,
            f"a defect without its mask{', as are ' if named else ''}{', '.join(named)}:"
            f" {len(missing)} of {len(defects)} defective images have none; add them, here"
            f" ground_truth/{first.defect_type}/{first.path.stem}_mask.png, or remove all masks to"
            " measure whole images only",
        )

    @property
    def has_masks(self) -> bool:
        """Whether it is known where the defects are, so that pixels can be measured."""
        return all(sample.mask_path for sample in self.test if sample.is_anomalous)


def find_categories(root: str | os.PathLike[str], good: str | None = None) -> list[Category]:
    """Find the categories of a data set.

    Only file names are read. Folders beside the categories that hold neither ``train`` nor
    ``test`` nor ``ground_truth`` are ignored, as are those beside ``train/good``.

    Parameters
    ----------
    root : one category, or a folder of many
    good : name of the folders of good images, in any case, where it is not ``"good"``. A name that is
        given is not asked about: with ``good="good"``, ``clean`` is a type of defect.

    Returns
    -------
    list of Category, sorted by name

    Raises
    ------
    DatasetError
        No category is there; no ``train/good`` or ``test``, or no images in them; a folder that seems
        to hold good images and has another name, or none of the name that is given; a mask
        without its image, among the images, for some of the defects only, or of the name of another.

    Warns
    -----
    UserWarning
        Files were left out that may be images; the test images are all good or all defective;
        ``ground_truth`` holds other files alone, or is not there while another folder beside ``test``
        holds images.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(root, "no such folder")
    folders = [root] if _looks_like_category(root) else _folders(root)
    found = [_Layout(folder, good) for folder in folders if _looks_like_category(folder)]
    if not found:
        raise DatasetError(
            root, "no data set here: expected train/good and test, in it or in its subfolders"
        )
    categories = [layout.read() for layout in found]
    if good and not any(layout.found_named for layout in found):
        raise DatasetError(
            root, f"no folder of good images is called {good}: give another good=NAME"
        )
    warn_of_left_out(root, sum((layout.left_out for layout in found), Counter()))
    return categories


def find_good(folder: Path, images: Iterable[Path]) -> Path | None:
    """The folder of good images, in a folder that seems to hold images of defects, too.

    Looks for data sets, and for parts of one, at any depth.

    Parameters
    ----------
    folder : to be fitted
    images : those in it

    Returns
    -------
    None, if all that is there may be good
    """
    inside: dict[Path, list[Path]] = defaultdict(list)  # folders that hold images, in their folder
    for child in sorted(_between(folder, images)):
        inside[child.parent].append(child)
    for place in sorted(inside, key=lambda place: (len(place.parts), place)):
        children = inside[place]
        parts = {_plain(part) for part in PARTS} & {_plain(child.name) for child in children}
        trains = [child for child in children if _plain(child.name) == TRAIN]
        goods = [g for train in trains for g in inside.get(train, []) if looks_good(g.name)]
        if goods or len(parts) > 1:
            return goods[0] if goods else place / TRAIN
        goods = [child for child in children if looks_good(child.name)]
        if goods and len(goods) < len(children):
            return goods[0]
    return None


def find_bad(folder: Path, images: Iterable[Path]) -> Path | None:
    """A folder whose name says that its images show defects.

    Parameters
    ----------
    folder : to be fitted
    images : those in it
    """
    return next(
        (place for place in sorted(_between(folder, images)) if looks_bad(place.name)), None
    )


def refuse_masks(folder: Path, images: Collection[Path], unmasked: Collection[Path]) -> None:
    """Ask about what is called a mask, and lies where images are looked for.

    Parameters
    ----------
    folder : that was searched
    images : those in it
    unmasked : those of them that have no mask themselves

    Raises
    ------
    DatasetError
        An image is named as the mask of the one beside it, or lies in a folder that is called masks.
    """
    for place in sorted(_between(folder, unmasked)):
        if _MASK_FOLDER.fullmatch(_plain(place.name)):
            raise DatasetError(
                place,
                f"does this folder hold masks? They go into {GROUND_TRUTH}, beside {TRAIN} and {TEST};"
                " if these are images, rename it",
            )
    there = {path.with_suffix("") for path in images}
    for path in sorted(unmasked):
        name = _MASK_NAME.fullmatch(path.stem)
        if name and path.with_name(name[1]) in there:
            raise DatasetError(
                path,
                f"is this the mask of {name[1]}, which lies beside it? Masks go into {GROUND_TRUTH};"
                " if it is an image, rename it",
            )


def _between(folder: Path, images: Iterable[Path]) -> set[Path]:
    """The folders below a folder that hold images, themselves or in their subfolders."""
    own = {path.parent for path in images}
    return {
        place for parent in own for place in (parent, *parent.parents) if folder in place.parents
    }


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if not is_litter(entry.name)]
    return sorted(path for path in found if os.path.isdir(path))  # noqa: PTH112  (never raises)


def _named(folder: Path, name: str) -> list[Path]:
    """Subfolders of this name, however it is spelled: Train, ground truth, GroundTruth."""
    return [child for child in _folders(folder) if _plain(child.name) == _plain(name)]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name).casefold()


def _looks_like_category(folder: Path) -> bool:
    return any(_named(folder, part) for part in PARTS)


class _Layout:
    """Reader of one category.

    Attributes
    ----------
    left_out : as `npad.images.folders.Found`, of all its folders
    found_named : whether a folder of good images has the name that was given
    """

    def __init__(self, root: Path, good: str | None) -> None:
        self.left_out: Counter[str] = Counter()
        self.found_named = False
        self._root = root
        self._good = good
        self._names = {GOOD, (good or GOOD).casefold()}

    def read(self) -> Category:
        train_root, test_root, truth_root = (self._part(part) for part in PARTS)
        train = self._train(train_root)
        test = self._test(test_root, truth_root)
        n_defects = sum(sample.is_anomalous for sample in test)
        if n_defects == len(test):
            _warn(
                f"{test_root}: no good images, so image metrics are undefined; if one of these folders"
                f" holds them, call it {GOOD}: {', '.join(sorted({s.defect_type for s in test}))}"
            )
        if n_defects == 0:
            _warn(f"{test_root}: no defective images, so metrics are undefined")
        return Category(self._root.resolve().name, train, test)

    def _part(self, name: str) -> Path:
        found = _named(self._root, name)
        if len(found) > 1:
            raise DatasetError(found[1], f"is there beside {found[0].name}: keep one")
        return found[0] if found else self._root / name

    def _good_folder(self, part: Path) -> Path | None:
        folders = _folders(part) if part.is_dir() else []
        found = [folder for folder in folders if folder.name.casefold() in self._names]
        if len(found) > 1:
            raise DatasetError(
                found[1], f"holds good images, as does {found[0].name}: put them in one folder"
            )
        if self._good and found and found[0].name.casefold() == self._good.casefold():
            self.found_named = True
            return found[0]
        for folder in folders:
            if folder not in found and looks_good(folder.name):
                raise DatasetError(
                    folder,
                    f'are these the good images? Then give good="{folder.name}", or put them in'
                    f' {part.name}/{GOOD}; if they show defects, give good="{GOOD}", or rename it',
                )
        return found[0] if found else None

    def _images(self, folder: Path) -> list[Path]:
        if not folder.is_dir():
            raise DatasetError(
                folder,
                "no such folder: the MVTec AD layout needs it; there are "
                + ", ".join(child.name for child in _folders(folder.parent)),
            )
        found = search(folder)
        if not found.images:
            raise DatasetError(folder, found.nothing())
        self.left_out += found.left_out
        return found.images

    def _train(self, root: Path) -> list[Path]:
        folder = self._good_folder(root)
        if folder is None:
            there = ", ".join(child.name for child in _folders(root)) if root.is_dir() else ""
            raise DatasetError(
                root / (self._good or GOOD),
                "no such folder: the MVTec AD layout needs it, for the good images to fit"
                + (f"; if it is one of {there}, name that, as in good=NAME" if there else ""),
            )
        images = self._images(folder)
        refuse_masks(folder, images, images)
        return images

    def _test(self, root: Path, truth_root: Path) -> list[Sample]:
        good = self._good_folder(root)
        images = self._images(root)
        types: dict[str, list[Path]] = {folder.name: [] for folder in _folders(root)}
        for path in images:
            if path.parent == root:
                raise DatasetError(
                    path, f"put it in a folder that names its type: {root.name}/{GOOD}"
                )
            types[path.relative_to(root).parts[0]].append(path)
        for name, paths in types.items():
            if not paths:
                held = search(root / name)
                linked = "a link to a folder that is read already: remove it"
                raise DatasetError(root / name, linked if held.images else held.nothing())
        by_stem = _by_stem(images, root, good)
        masks = self._masks(truth_root, by_stem, good)
        unmasked = {p for stem, paths in by_stem.items() if stem not in masks for p in paths}
        refuse_masks(root, images, unmasked)
        return [
            Sample(path, PurePath(stem).parts[0], masks.get(stem))
            for stem, paths in by_stem.items()
            for path in paths
        ]

    def _masks(
        self, root: Path, images: Mapping[str, list[Path]], good: Path | None
    ) -> dict[str, Path]:
        """The mask of each image that has one, both by the image's stem."""
        if not root.is_dir():
            for folder in _folders(self._root):
                if _plain(folder.name) not in PARTS and search(folder).images:
                    _warn(f"{folder}: not read; masks are looked for in {GROUND_TRUTH}")
            return {}
        files = search(root)
        if files.left_out and not files.images:
            _warn(f"{root}: no masks, since {files.nothing()}")
            return {}
        self.left_out += files.left_out
        left = _by_stem(files.images, root, good)
        found = {stem: left.pop(f"{stem}_mask", []) + left.pop(stem, []) for stem in images}
        folders: dict[str, Path] = {}  # of several masks
        for stem in [*left]:
            above = PurePath(stem).parent.as_posix()
            if above in images:
                folders[above] = left.pop(stem)[0].parent
        for orphans in left.values():
            raise DatasetError(
                orphans[0],
                "a mask without its image in test: name it as its image, with _mask at the end or"
                " without, add the image, or remove the mask; several masks of one image go into a"
                " folder that has its name",
            )
        for stem, folder in folders.items():
            found[stem].append(folder)
        for stem, masks in found.items():
            if len(masks) > 1:
                raise DatasetError(masks[1], f"a second mask of {images[stem][0]}: keep one")
            if masks and len(images[stem]) > 1:
                raise DatasetError(
                    images[stem][1], f"shares its mask with {images[stem][0]}: rename one"
                )
        return {stem: masks[0] for stem, masks in found.items() if masks}


def _by_stem(paths: list[Path], root: Path, good: Path | None) -> dict[str, list[Path]]:
    """Files by their path below root, without the suffix; good images lie in "good"."""
    goods = {GOOD, good.name.casefold() if good else GOOD}
    stems: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        kind, *rest = path.relative_to(root).with_suffix("").parts
        kind = GOOD if kind.casefold() in goods else kind
        stems[PurePath(kind, *rest).as_posix()].append(path)
    return stems


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=2)
