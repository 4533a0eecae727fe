"""The kinds of problem that data can have: a short name that stays, how severe it is, and what to do about it.

``error``: training would crash, or learn and score something else than is meant. ``warning``: it would run, and is hardly
meant so. ``note``: worth knowing.
"""
from typing import NamedTuple


class Kind(NamedTuple):
    severity: str
    remedy: str


_MEND_FILE = 'Replace these files, or remove them and their partners.'
_WRITER = 'Mend the program that wrote the file.'
_SAVE_LABELS = 'Write these label maps as PNG with one channel of 8 bits, the class index of each pixel.'
_BOX = 'A bbox is [x, y, width, height] in pixels; mmdet leaves such annotations out.'
_POLYGON = ('A polygon is [x1, y1, x2, y2, x3, y3, ...] in pixels; remove others, and annotations that have no other.')
_DOWNLOAD = 'Write or download it again; annotation files are JSON.'

KINDS: dict[str, Kind] = {
    # folders, lists and pairs
    'data-root-missing': Kind('error', 'Name yours with --data-root DIR.'),
    'folder-missing': Kind('error', 'Name the folder above with --data-root DIR, or set data_prefix of the data set.'),
    'ade-full-release': Kind('error', (
        'This is the full ADE20K release, whose labels are objects and parts of 3,000 kinds. Training on 150 classes needs '
        'the benchmark\'s: ADEChallengeData2016.zip (http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip); '
        'name the unpacked folder ADEChallengeData2016 with --data-root.')),
    'annotation-file-missing': Kind('error', 'Name the folder above with --data-root DIR, or set ann_file of the data set.'),
    'list-unreadable': Kind('error', 'Write the list again as a text file in UTF-8, a name without suffix a line.'),
    'no-images': Kind('error', 'Check the data root, or set img_suffix of the data set.'),
    'image-missing': Kind('error', 'Add the images, or remove what names them.'),
    'label-missing': Kind('error', 'Add the label maps, or remove the images.'),
    'label-without-image': Kind('note', 'Nothing reads these label maps; remove them, or add their images.'),
    'suffix-ignored': Kind('warning', 'Images with another suffix are left out without a word: rename or convert them, or set '
                                      'img_suffix of the data set.'),
    'cityscapes-raw-labels': Kind('error', 'Convert them:\n  python tools/convert_cityscapes.py ROOT'),
    'broken-link': Kind('error', 'Put the file where the link points to, or remove the link.'),
    'name-not-text': Kind('warning', 'Rename these files with letters, digits, _ and -; logs, results and other programs fail '
                                     'on such names.'),
    'count-differs': Kind('note', 'Fine for data of your own; otherwise unpack the archives again, all of them.'),
    'same-data': Kind('warning', 'Scores say nothing of images that were trained with; name other data for validation.'),
    'leak': Kind('warning', 'Scores on images that were trained with are too good; remove them from one of the two.'),
    'duplicate-image': Kind('warning', 'Such images count twice; remove all but one, and see which label is right.'),
    # files
    'unreadable': Kind('error', 'See to it that you may read these files (chmod u+r), and that the disk is well.'),
    'not-a-file': Kind('error', 'Remove it, or put the file there.'),
    'empty-file': Kind('error', _MEND_FILE),
    'cut-off': Kind('error', _MEND_FILE),
    'not-an-image': Kind('error', _MEND_FILE),
    'undecodable': Kind('error', _MEND_FILE),
    'decoder-crash': Kind('error', _MEND_FILE),
    'too-large': Kind('error', 'Cut these images and their labels into tiles, or scale both down.'),
    'format-suffix': Kind('note', 'They are read all the same; other programs may go by the suffix.'),
    'image-tiny': Kind('warning', 'Less than one step of the deepest feature map; remove thumbnails.'),
    'image-cmyk': Kind('warning', 'Colours depend on the program that reads it; convert these to RGB.'),
    'image-16-bit': Kind('warning', 'Training reads the upper 8 bits only; stretch the values to 8 bits and save those.'),
    'image-animated': Kind('warning', 'Training reads the first picture only; save it as a file of its own.'),
    'image-alpha': Kind('note', 'Training drops the transparency, and shows what lies below; paint a background if that '
                                'matters.'),
    'exif-turned': Kind('error', 'Training turns the image as its EXIF says, and not the label. Turn the pixels and drop the '
                                 'tag (exiftran -ai, ImageOps.exif_transpose), or turn the label maps.'),
    'exif-orientation': Kind('warning', 'Training turns the image as its EXIF says; see that the label was drawn on the '
                                        'turned one, or drop the tag.'),
    # label maps
    'size-mismatch': Kind('error', _MEND_FILE),
    'label-channels': Kind('error', _SAVE_LABELS),
    'label-lossy': Kind('error', f'Lossy compression changes ids at every border. {_SAVE_LABELS}'),
    'label-fractions': Kind('error', _SAVE_LABELS),
    'label-depth': Kind('warning', _SAVE_LABELS),
    'label-palette': Kind('note', 'Training reads the indices, which is right if they are the classes; programs that read '
                                  'with OpenCV see the colours.'),
    'label-out-of-range': Kind('error', 'Set num_classes of every head (and the data set\'s classes) to the labels, or mend '
                                        'the label maps.'),
    'label-all-ignored': Kind('warning', 'Nothing is learnt from such images; see that their labels are right.'),
    'reduce-zero-pipeline': Kind('error', 'Set it at the data set only; the pipeline takes it from there.'),
    'reduce-zero-on': Kind('warning', 'If 0 is a class, set reduce_zero_label=False: with True every class is one off.'),
    'reduce-zero-off': Kind('warning', 'If 0 is "unlabelled", set reduce_zero_label=True: with False every class is one off.'),
    'class-absent': Kind('note', 'Such classes cannot be learnt or scored here.'),
    'class-names': Kind('error', 'Pick from those the type has, or use type BaseSegDataset, which has none of its own.'),
    'classes-mismatch': Kind('error', 'Name the classes: --classes NAME,NAME,...'),
    'metric-file': Kind('error', 'Detections can be scored with the annotations of the same images only.'),
    # annotation files: as a whole
    'json-empty': Kind('error', 'Write or download it again.'),
    'json-not-text': Kind('error', _DOWNLOAD),
    'json-cut-off': Kind('error', 'Write or download it again.'),
    'json-invalid': Kind('error', _DOWNLOAD),
    'json-nesting': Kind('error', 'An annotation file nests five levels deep; write it again.'),
    'coco-structure': Kind('error', 'images, annotations and categories are lists of objects.'),
    'coco-key-missing': Kind('error', _WRITER),
    'coco-type': Kind('error', _WRITER),
    'coco-no-annotations': Kind('error', 'Name a file that has annotations (ann_file).'),
    'coco-no-images': Kind('error', 'Name a file with images (ann_file).'),
    'info-missing': Kind('note', "Some releases of pycocotools need 'info' to score; add an empty one."),
    'iscrowd-missing': Kind('note', "Scoring with this file needs 'iscrowd' of every annotation, 0 or 1."),
    'segmentation-missing': Kind('note', "Masks are neither trained nor scored without 'segmentation'."),
    # annotation files: entries
    'id-repeated': Kind('error', 'Give each entry an id of its own.'),
    'name-repeated': Kind('error', 'Give each of the categories a name of its own.'),
    'file-repeated': Kind('warning', 'Such images count twice, each time with some of the objects; join their entries.'),
    'id-unscorable': Kind('error', 'Number the annotations from 1.'),
    'image-unknown': Kind('error', 'Add the images, or remove these annotations.'),
    'category-unknown': Kind('error', 'Add the categories, or remove these annotations.'),
    'stated-size': Kind('error', 'Replace these images, or mend their width and height in the file.'),
    'size-invalid': Kind('error', 'width and height are the pixels of the image.'),
    'bbox-invalid': Kind('error', 'A bbox is [x, y, width, height] in pixels.'),
    'bbox-flat': Kind('error', _BOX),
    'bbox-outside': Kind('error', _BOX),
    'bbox-corners': Kind('error', 'A bbox is [x, y, width, height]; these look like [x1, y1, x2, y2].'),
    'bbox-beyond': Kind('note', 'Training clips such boxes to the image.'),
    'area-invalid': Kind('error', 'The area of an annotation is its number of pixels.'),
    'area-not-positive': Kind('error', 'mmdet leaves annotations without an area out; write that of the mask or the box.'),
    'mask-kind': Kind('error', "A 'segmentation' is a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...], or RLE, "
                               "{'size': [height, width], 'counts': ...}."),
    'mask-size': Kind('error', 'The size of an RLE is [height, width] of the image; write these masks again.'),
    'polygon-short': Kind('error', _POLYGON),
    'polygon-number': Kind('error', _POLYGON),
    'rle-broken': Kind('error', 'The runs of an RLE add up to height x width; write these masks again.'),
    'nothing-to-train': Kind('error', 'Check the classes (--classes) and filter_cfg of the data set.'),
    'left-out': Kind('note', 'Set filter_cfg of the data set, if they are to be trained with.'),
}
