// Prints Stryker's mutants of the files named by the arguments, as JSON. Usage:
//   node stryker.mjs <folder with node_modules> <file> ...
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [, , folder, ...names] = process.argv;
const { resolve } = createRequire(`${folder}/`);
const load = (name) => import(pathToFileURL(resolve(name)));

const { createInstrumenter } = await load("@stryker-mutator/instrumenter");
const { createInjector } = await load("typed-inject");
const { commonTokens } = await load("@stryker-mutator/api/plugin");

const silent = new Proxy({}, { get: (_, name) => (name.startsWith("is") ? () => false : () => {}) });
const instrumenter = createInjector()
  .provideValue(commonTokens.logger, silent)
  .injectFunction(createInstrumenter);
const files = names.map((name) => ({ name, mutate: true, content: readFileSync(name, "utf8") }));
const options = { plugins: null, excludedMutations: [], ignorers: [], noHeader: true };
const { mutants } = await instrumenter.instrument(files, options);
console.log(JSON.stringify(mutants));
