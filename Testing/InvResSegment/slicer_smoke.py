"""Run by ctest in a real Slicer: the installed extension has its backend, and PythonSlicer starts it."""

import json
import shutil
import subprocess
import unittest

import slicer


class BackendStartsTest(unittest.TestCase):
    """What the panel relies on before anything is installed."""

    def test_the_backend_lists_its_models_under_PythonSlicer(self):
        from InvResSegmentLib import Paths

        environment = slicer.util.startupEnvironment()
        environment["PYTHONPATH"] = str(Paths.backendFolder())
        command = [shutil.which("PythonSlicer"), "-m", "invres", "models", "list", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(events[-1]["event"], "result")

    def test_the_module_is_there_with_its_icon_and_panel(self):
        self.assertTrue(hasattr(slicer.modules, "invressegment"))
        self.assertFalse(slicer.modules.invressegment.icon.isNull())
        self.assertIsNotNone(slicer.modules.invressegment.widgetRepresentation())
