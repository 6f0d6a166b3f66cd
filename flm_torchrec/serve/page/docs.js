// The routes of the server, from its OpenAPI document. Everything is shown as text.

const element = (name, text) => {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
};

function shape(title, content) {
  const schema = content?.["application/json"]?.schema;
  if (!schema) return [];
  const details = document.createElement("details");
  details.append(element("summary", title), element("pre", JSON.stringify(schema, null, 2)));
  return [details];
}

function route(path, method, operation) {
  const section = document.createElement("section");
  section.append(element("h2", `${method.toUpperCase()} ${path}`), element("p", operation.operationId));
  for (const parameter of operation.parameters ?? []) {
    section.append(element("p", `${parameter.name}: ${JSON.stringify(parameter.schema)}`));
  }
  section.append(...shape("asks", operation.requestBody?.content));
  section.append(...shape("answers", operation.responses?.["200"]?.content));
  return section;
}

const response = await fetch("openapi.json");
const described = await response.json();
const routes = Object.entries(described.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, operation]) => route(path, method, operation)),
);
document.querySelector("#routes").replaceChildren(...routes);
