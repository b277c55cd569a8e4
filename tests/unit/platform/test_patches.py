"""PatchSet: replacements are exact to take back, also those of names the owner only inherited."""

from marlhf_mega.platform.patches import PatchSet


class Parent:
    greeting = "parent"


class Child(Parent):
    colour = "red"


def test_uninstall_restores_replaced_inherited_and_new_names():
    patches = PatchSet(lambda patches, module: None)
    before = dict(vars(Child))
    patches.install()
    patches.replace(Child, "colour", "blue")
    patches.replace(Child, "colour", "green")
    patches.replace(Child, "greeting", "child")
    patches.replace(Child, "size", 3)
    assert (Child.colour, Child.greeting, Child.size) == ("green", "child", 3)

    patches.uninstall()

    assert dict(vars(Child)) == before
    assert Child.greeting == "parent"


def test_install_and_uninstall_twice_are_harmless():
    patches = PatchSet(lambda patches, module: None)
    patches.install()
    patches.install()
    assert patches.installed
    patches.uninstall()
    patches.uninstall()
    assert not patches.installed
