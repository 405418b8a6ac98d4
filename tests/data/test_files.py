import os

import pytest

from bcoskit.data import ImageError, find_images, read_image


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in (
        "b.png",
        "a.JPG",
        "notes.txt",
        ".hidden.png",
        "set/2.webp",
        "set/10.webp",
        "set/deep/x.tiff",
        "set/.cache/y.png",
        "odd[1].png",
        "empty/readme.md",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*paths):
    return [path.as_posix() for path in find_images(paths)]


def test_files_whatever_their_name(tree):
    assert found("notes.txt", tree / "b.png", ".hidden.png") == [
        "notes.txt",
        f"{tree}/b.png",
        ".hidden.png",
    ]


def test_folders(tree):
    assert found("set") == ["set/10.webp", "set/2.webp", "set/deep/x.tiff"]
    inside = ["a.JPG", "b.png", "odd[1].png", "set/10.webp", "set/2.webp", "set/deep/x.tiff"]
    assert found(".") == inside
    assert found(tree) == [f"{tree}/{name}" for name in inside]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.png", ["b.png", "odd[1].png"]),
        ("*", ["a.JPG", "b.png", "odd[1].png"]),
        ("?.*", ["a.JPG", "b.png"]),
        ("set/[0-9]*", ["set/10.webp", "set/2.webp"]),
        ("*/*.webp", ["set/10.webp", "set/2.webp"]),
        ("set/**", ["set/10.webp", "set/2.webp", "set/deep/x.tiff"]),
        ("**/*.tiff", ["set/deep/x.tiff"]),
        ("**/deep/**/*.tiff", ["set/deep/x.tiff"]),
        ("s*/.cache/*.png", []),
        ("set/.cache/*.png", ["set/.cache/y.png"]),
        ("odd[1].png", ["odd[1].png"]),
    ],
)
def test_patterns(tree, pattern, expected):
    if expected:
        assert found(pattern) == expected
        assert found(tree / pattern) == [f"{tree}/{name}" for name in expected]
    else:
        with pytest.raises(ImageError, match="no file found"):
            found(pattern)


@pytest.mark.parametrize("path", ["absent.png", "absent/", "absent/*.png", "*.gif", "empty", "notes.*"])
def test_what_matches_nothing_is_named(tree, path):
    with pytest.raises(ImageError, match=r"absent|\*\.gif|empty|notes") as caught:
        found("b.png", path)
    assert "no such file" in str(caught.value) or "no file found" in str(caught.value)


def test_expansion_is_lazy(tree):
    images = find_images(path for path in ["b.png", "set", "absent"])
    assert [next(images).name for _ in range(3)] == ["b.png", "10.webp", "2.webp"]
    (tree / "absent").mkdir()
    (tree / "absent" / "late.png").touch()
    assert [path.name for path in images] == ["x.tiff", "late.png"]


def test_links_are_followed_without_loops(tree):
    (tree / "set/loop").symlink_to(tree, target_is_directory=True)
    (tree / "set/deep/again").symlink_to(tree / "set", target_is_directory=True)
    (tree / "link").symlink_to(tree / "set/deep", target_is_directory=True)
    assert found("link") == [
        "link/again/10.webp",
        "link/again/2.webp",
        "link/again/loop/a.JPG",
        "link/again/loop/b.png",
        "link/again/loop/odd[1].png",
        "link/x.tiff",
    ]
    assert found("set/**/*.tiff") == ["set/deep/x.tiff"]


def test_dangling_links_are_not_passed_over(tree):
    (tree / "set/gone.png").symlink_to("nowhere")
    (tree / "set/self.png").symlink_to("self.png")
    assert found("set")[-2:] == ["set/gone.png", "set/self.png"]


def test_unreadable_folders_are_named(tree, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    # It is yielded among the images, which are found all the same, and whoever reads it is told why.
    files = list(find_images(["set"]))
    (folder,) = [file for file in files if file.name == "deep"]
    assert len(files) > 1
    with pytest.raises(ImageError, match="deep: Permission denied"):
        read_image(folder)


def test_empty_paths_are_refused():
    with pytest.raises(ImageError, match="empty"):
        list(find_images([""]))


def test_a_single_string_is_refused():
    with pytest.raises(TypeError, match="put it in a list"):
        find_images("photos")
